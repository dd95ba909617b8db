"""The code of one block: traced, proven equal to what ran, edited."""
