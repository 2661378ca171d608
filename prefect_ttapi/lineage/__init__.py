"""Who made what: manifest, artifacts, gallery."""
