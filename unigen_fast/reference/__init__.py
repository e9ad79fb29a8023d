"""Every op in plain PyTorch: what is true.

The oracle of the tests, and the path wherever no kernel fits. A function here has the signature of its op in `_ops.py`
(all options given, strings already checked) and returns what the op returns: the value, then what backward needs.
"""
