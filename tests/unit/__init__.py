"""Unit tests of the Triton-free library, on random models of two layers."""
