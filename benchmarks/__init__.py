"""Programs that train, compare and time; nothing imports them."""
