"""Operations with kernels: one folder each, behind one gate (`api.py`)."""
