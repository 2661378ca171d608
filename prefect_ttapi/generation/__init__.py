"""One request, paid once: from a request to stored, recorded and delivered images."""
