"""Where replicas come from: the driver protocol, the supervisor that is the only parent, local and static drivers."""
