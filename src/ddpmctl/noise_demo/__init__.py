"""The forward process on one picture, drawn as a figure: what the network gets to see at each noise level."""
