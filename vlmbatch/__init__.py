"""vlmbatch: ask a vision-language model something about every image of a dataset."""

__version__ = "0.1.0"
