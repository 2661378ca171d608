"""Record and show who made what: manifest, artifacts, assets, events, gallery."""
