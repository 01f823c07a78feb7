"""A GPU made of host memory, so that what a GPU would refuse fails here too: see gpu.cpp and gpu.py."""
