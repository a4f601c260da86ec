"""A process that is a Ray cluster of two nodes on this machine, and a head with room for no worker.

python cluster.py: prints its address, and ends with its standard input. RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH say
whether it asks for a token.
"""

import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=8)
    print(nodes.address, flush=True)
    sys.stdin.read()
    nodes.shutdown()
