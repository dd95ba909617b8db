"""Small things that every part uses and that know nothing of networks."""
