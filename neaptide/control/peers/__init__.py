"""The autoscaling policies of other projects, as they publish them: what Neaptide's own policy is measured against.
Nothing here is ours, and nothing here is tuned beyond its one target.
"""

from neaptide.control.peers.table import DEFAULT_U, GRID, PEERS, peers

__all__ = ["DEFAULT_U", "GRID", "PEERS", "peers"]
