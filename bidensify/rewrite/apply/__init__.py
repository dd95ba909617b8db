"""Step 3 of a rewrite: a plan is carried out on a network, in place."""
