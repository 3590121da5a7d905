"""README's commands for Kubernetes: ``python -m tests.deploy.commands`` prints them as they stand there, for bash.

All but those of the operator, which wants three nodes, and of the gateway. After each block the shell's function
`check` is called, for whoever runs them to define.
"""

import re

from tests.service import ROOT

SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Kubernetes\n")[2].partition("\n## ")[0]
BLOCKS = [block.strip() for block in re.findall(r"^```\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)]
UNTRIED = [block for block in BLOCKS if "helm install" in block or "k8s/gateway/" in block]


def script(registry: str) -> str:
    """Return them, with the registry that README leaves to its reader."""
    blocks = [block.replace("REGISTRY", registry) for block in BLOCKS if block not in UNTRIED]
    return "".join(f"{block}\ncheck\n" for block in blocks)


if __name__ == "__main__":
    print(script("localhost"), end="")
