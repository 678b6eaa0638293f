"""A Ray cluster of several nodes on this machine, in a process of its own, that loses nodes and gets others.

    python nodes.py 2       a head without CPUs and two nodes of one CPU; its address on stdout, then commands on stdin:
                            `lose` (the node that came first is killed), `add` (a node comes)
"""

import os
import sys

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


def main() -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_period_ms": "1000",
                   "RAY_health_check_failure_threshold": "3", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(**NODE) for _ in range(int(sys.argv[1]))]
    cluster.wait_for_nodes()
    print(f"address {cluster.address}", flush=True)
    for line in sys.stdin:
        if line.strip() == "lose":
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
        elif line.strip() == "add":
            nodes.append(cluster.add_node(**NODE))
        print(f"done {line.strip()}", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
