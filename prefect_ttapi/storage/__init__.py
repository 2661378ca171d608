"""Where images live, and what is remembered of who paid for them; usable without Prefect runs."""
