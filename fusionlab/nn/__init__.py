"""Parts with no paper in them."""
