"""Step 2 of a rewrite: from a record and a configuration to a plan, which is data."""
