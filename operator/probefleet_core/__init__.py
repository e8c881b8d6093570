"""What a policy means and what a report says: pure functions over values."""
