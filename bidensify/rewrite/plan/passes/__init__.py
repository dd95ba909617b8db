"""The passes of a plan in the making, in their order: norms, adds, streams, activations, nonnegative, notes."""
