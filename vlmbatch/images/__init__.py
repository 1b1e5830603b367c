"""An image reference becomes pixels: fetch, decode, shrink, all within one byte budget."""
