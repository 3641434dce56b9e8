"""The server under Ray Serve, a replica on each node: python examples/ray_serve.py [MODEL.gguf]

Needs pip install 'ray[data,serve]' starlette uvicorn prometheus-client. It answers on port 8000 until Ctrl-C,
as `pybmc serve` does. A client that sends the whole conversation each time may reach any replica; a replica
that has read its beginning already is the quicker one.
"""

import sys

from ray import serve

MODEL = sys.argv[1] if len(sys.argv) > 1 else "demo"


def build(model=MODEL):
    """The application, in the process of a replica: the model is opened there."""
    from pybmc.hub import find
    from pybmc.serve.app import app

    return app(find(model), parallel=8)


# One replica takes a whole node's cores in a cluster of equal nodes: set num_cpus to their number.
replicas = serve.deployment(serve.ingress(build)(), num_replicas=1, ray_actor_options={"num_cpus": 1},
                            max_ongoing_requests=64)

if __name__ == "__main__":
    serve.run(replicas.bind(), blocking=True)
