"""Products with weights of 8 and 4 bits, products with a weight for each group of rows, and the
selective scan, on CPUs, called by XLA."""

from ._grouped import grouped_outer, grouped_product
from ._load import isa
from ._product import product
from ._scan import selective_scan, selective_scan_reverse


__all__ = [
    "grouped_outer",
    "grouped_product",
    "isa",
    "product",
    "selective_scan",
    "selective_scan_reverse",
]
