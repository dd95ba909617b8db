"""Methods that binarize the linear layers of transformers. Their attention products stay in full precision here.

What enters a product of queries and keys, or of attention and values, is no input of a layer: the authors binarize it inside
their attention modules, this library leaves a network's attention as it is.
"""
