"""The one native library and what calls it: found by path, loaded through ctypes, plain C interface.

Nothing here is needed: without the library (or on another device or dtype) the same equations run as torch operations.
"""
