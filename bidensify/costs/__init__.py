"""What a network costs: parameters, bytes and operations, of each layer and in total."""
