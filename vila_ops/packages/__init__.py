"""What comes from outside: pinned packages and pretrained weights, as local folders."""
