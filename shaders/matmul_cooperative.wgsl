// Cooperative.
