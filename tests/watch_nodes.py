"""`python watch_nodes.py ADDRESS`: twice a second a line of JSON: time, worker nodes by kind, pending demands."""

import json
import sys
import time
from collections import Counter

from ray.autoscaler.v2.sdk import get_cluster_status

while True:
    status = get_cluster_status(sys.argv[1])
    totals = [node.total_resources() for node in [*status.active_nodes, *status.idle_nodes]]
    nodes = Counter(
        "gpu" if total.get("GPU") else "cpu" for total in totals if total.get("CPU")
    )  # the head has neither
    demands = [
        {"bundle": dict(bundle.bundle), "count": bundle.count}
        for demand in status.resource_demands.ray_task_actor_demand
        for bundle in demand.bundles_by_count
    ]
    print(json.dumps({"time_s": time.time(), "nodes": nodes, "demands": demands}), flush=True)
    time.sleep(0.5)
