"""Tuned kernel configs per GPU, and the code that names, finds and checks them."""
