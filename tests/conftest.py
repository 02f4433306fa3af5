"""Makes helper modules of this folder (`tiny_models`, ...) importable from the tests of every room."""
