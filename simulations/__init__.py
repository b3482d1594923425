"""A whole federation on one machine: virtual hospitals, phantoms, benchmarks."""
