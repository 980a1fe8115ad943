"""PersonMAE: fast masked pre-training of Vision Transformers on unlabelled person crops, for person re-identification."""

__version__ = "0.1.0"
