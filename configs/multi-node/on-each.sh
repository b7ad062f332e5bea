#!/bin/bash
# Runs a command once on each host of a file that has one name a line, the first being this machine; on the others by
# ssh, in the same folder. Ends all of them when one fails. For the `launcher:` of a profile where there is no Slurm.
# Use:    on-each.sh HOSTS COMMAND...
# Tried:  not yet between machines; on one, with a stand-in for ssh (tests/distributed)
mapfile -t hosts < <(grep -v '^ *$' "$1")
shift
command=$(printf '%q ' "$@")
# All users of a machine can read command lines: variables that may hold a secret are not passed.
passed=$(compgen -e | grep -E '^((HF|NCCL|CUDA|TORCH|OMP|DS)_|PYTHON)' | grep -vE 'TOKEN|KEY|SECRET|PASS' | while read -r name; do printf '%s=%q ' "$name" "${!name}"; done)

pids=()
trap 'kill "${pids[@]}" 2> /dev/null' EXIT
trap 'exit 143' TERM
for node in "${!hosts[@]}"; do
    if [ "$node" -eq 0 ]; then
        CAI_NODE=0 "$@" &
    else # -tt: a terminal, so that the remote command ends when ssh does
        ssh -tt -o BatchMode=yes "${hosts[$node]}" "cd $(printf '%q' "$PWD") && exec env $passed CAI_NODE=$node $command" \
            < /dev/null &
    fi
    pids+=($!)
done
for _ in "${pids[@]}"; do
    wait -n || exit
done
