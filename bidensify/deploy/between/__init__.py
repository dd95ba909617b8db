"""What runs between packed layers: concatenations and upsamplings that are never made, results put where layers read them."""
