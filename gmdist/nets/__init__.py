"""Networks, and the layers and codebooks that they are made of."""
