"""Kubernetes' Pod Security Standards, level *restricted* (which includes *baseline*), checked by code.

Source: the page "Pod Security Standards" of Kubernetes' documentation, control by control. Windows' own are left out.
"""

from collections.abc import Iterator
from typing import Any

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
    "net.ipv4.ping_group_range",
}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
PROFILES = {"RuntimeDefault", "Localhost"}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")

Spec = dict[str, Any]


def violations(pod: Spec) -> list[str]:
    """Return what in a pod's spec the level forbids, a line each; empty: the pod would be admitted."""
    containers = [
        container for kind in ("initContainers", "containers", "ephemeralContainers") for container in pod.get(kind, ())
    ]
    found = list(_pod_violations(pod))
    for container in containers:
        found += [f"{container['name']}: {what}" for what in _container_violations(container, pod)]
    return found


def _pod_violations(pod: Spec) -> Iterator[str]:
    context = pod.get("securityContext", {})
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name))
    for volume in pod.get("volumes", ()):
        yield from (f"volume of type {kind}" for kind in set(volume) - {"name"} - VOLUMES)
    yield from (f"sysctl {each['name']}" for each in context.get("sysctls", ()) if each["name"] not in SYSCTLS)
    yield from _context_violations(context)


def _context_violations(context: Spec) -> Iterator[str]:
    """Yield what neither a pod's nor a container's securityContext may say."""
    options = context.get("seLinuxOptions", {})
    if options.get("type", "") not in SELINUX_TYPES or options.get("user") or options.get("role"):
        yield "seLinuxOptions"
    if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in PROFILES:
        yield "appArmorProfile"
    if context.get("seccompProfile", {}).get("type", "RuntimeDefault") not in PROFILES:
        yield "seccompProfile"
    if context.get("runAsUser") == 0:
        yield "runAsUser is 0"


def _container_violations(container: Spec, pod: Spec) -> Iterator[str]:
    context = container.get("securityContext", {})
    common = pod.get("securityContext", {})
    yield from _context_violations(context)
    if context.get("privileged"):
        yield "privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if context.get("procMount", "Default") != "Default":
        yield "procMount"
    if context.get("runAsNonRoot", common.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if "seccompProfile" not in context and "seccompProfile" not in common:
        yield "no seccompProfile"
    capabilities = context.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", ()):
        yield "capabilities are not dropped"
    if set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
        yield "capabilities are added"
    if any(port.get("hostPort") for port in container.get("ports", ())):
        yield "hostPort"
    handlers = [container.get(name, {}) for name in PROBES] + list(container.get("lifecycle", {}).values())
    if any(handler.get(kind, {}).get("host") for handler in handlers for kind in ("httpGet", "tcpSocket")):
        yield "a probe's or lifecycle handler's host"
