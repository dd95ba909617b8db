"""Bridges to other libraries' weights, saving and loading."""
