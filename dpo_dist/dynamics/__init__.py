"""What each pair taught: its rewards at every visit of training, the data map, and which labels look flipped."""
