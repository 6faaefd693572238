# The nodes of a sweep that are to be run, as rules. Which those are is decided in `state.py`; the engine orders them, counts what
# they take, hands them to Slurm, and leaves out what follows a failure.
import json

NODES = json.loads(open(config["plan"]).read())


rule all:
    input:
        [f"done/{node['name']}" for node in NODES],


for node in NODES:

    rule:
        name:
            node["rule"]
        input:
            [f"done/{need}" for need in node["needs"]],
        output:
            touch(f"done/{node['name']}"),
        threads: node["threads"]
        resources:
            **node["resources"],
        params:
            command=node["command"],
        shell:
            "{params.command}"
