#!/usr/bin/env bash
# README's "Kubernetes", command by command, in a cluster of kind's (https://kind.sigs.k8s.io); from a checkout that may
# be changed. In place of the operator's Couchbase, which needs three nodes, the database is the emulator: on this
# machine, with TLS on the ports that the NetworkPolicies let out, and with the user and roles of k8s/couchbase.
set -euo pipefail
cd "$(dirname "$0")/../.."

kind create cluster --wait 2m
# its IPv4 address on the cluster's network, which has an IPv6 one too
address=$(docker network inspect kind --format '{{range .IPAM.Config}}{{println .Gateway}}{{end}}' | grep -F .)

# Step 1: the images; the registry's 1.0.1 is what README's `set image` takes.
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' micro_svc_demo.py)
docker build --tag "demopy:$version" --tag localhost/demopy:1.0.1 .
docker build --tag "demopy-sample-data:$version" --target sample-data .
kind load docker-image "demopy:$version" localhost/demopy:1.0.1 "demopy-sample-data:$version"

# Step 2: where the database is; and the files that the other steps read.
sed -i "s/^  COUCHBASE_HOST: .*/  COUCHBASE_HOST: $address/" k8s/base/configmap.yaml
for name in admin-password password token; do
    python3 -c 'import secrets; print(secrets.token_urlsafe(18), end="")' >"$name"
done
roles=$(python3 -c 'from tests.real import Plan; print(Plan.of_manifests().roles)')
exec {said}< <(EMULATOR_PASSWORD=$(cat admin-password) EMULATOR_SECOND_PASSWORD=$(cat password) \
    exec python3 -m tests.emulator --empty --user Administrator --second-user demopy --roles "$roles" --host "$address" \
    --tls --kv-tls-port 11207 --management-tls-port 18091 --query-tls-port 18093)
emulator=$!
trap 'kill "$emulator"' EXIT
read -r ready <&"$said" # the line is printed when it is ready
cp "$(python3 -c 'import json, sys; print(json.loads(sys.argv[1])["ca_file"])' "$ready")" ca.crt

# After each of README's blocks: once the service is there, all its pods get ready, and it answers.
check() {
    if kubectl get deployment demopy -n demopy; then
        kubectl rollout status deployment demopy -n demopy --timeout=5m
        local service
        service=$(kubectl get service demopy-service -n demopy -o jsonpath='{.spec.clusterIP}')
        docker exec kind-control-plane curl -fsS --max-time 10 --output /dev/null \
            -H "Authorization: Bearer $(cat token)" "http://$service:8080/api/v1/id/7"
    fi
}
commands=$(python3 -m tests.deploy.commands)
set -x
eval "$commands"
