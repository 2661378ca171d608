"""Who may pay for a request, and what was paid for: one document per request, in the same store as the images."""
