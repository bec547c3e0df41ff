"""`python watch_nodes.py ADDRESS`: one line of JSON twice a second: time, worker nodes by type, and pending demands."""

import json
import sys
import time
from collections import Counter

from ray.autoscaler.v2.sdk import get_cluster_status

while True:
    status = get_cluster_status(sys.argv[1])
    nodes = Counter(n.ray_node_type_name for n in [*status.active_nodes, *status.idle_nodes])
    demands = [
        {"bundle": bundle.bundle, "count": bundle.count}
        for demand in status.resource_demands.ray_task_actor_demand
        for bundle in demand.bundles_by_count
    ]
    workers = {name: count for name, count in nodes.items() if name != "ray.head.default"}
    print(json.dumps({"time_s": time.time(), "nodes": workers, "demands": demands}), flush=True)
    time.sleep(0.5)
