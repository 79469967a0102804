# shellcheck shell=bash
# For what starts several nodes, to be sourced: whether work that failed is started again. The rules are those of
# dpo_dist/launcher/restarts.py, which one node alone uses; a batch script may have no Python. Reads RUN_DIR.
# Nothing here is a $(...): see launch/hosts.sh.
# shellcheck disable=SC2034            # who sources this says `restart`
tried=0 last_newest=none last_fault='' restart=''

# was_mistaken CODE: whether it was a user's mistake, of which the same would come again
was_mistaken() {
    read_fault
    [ "$1" = 2 ] || [[ $fault == *'"exit_code": 2'* ]]
}

# again MOST: whether it is started again, after which `restart` says how: at most so often without a newer checkpoint, and
# not after the same exception twice
# shellcheck disable=SC2034
again() {
    local most=$1 checkpoints=("$RUN_DIR"/checkpoints/step-*/COMPLETE) newest='' what=''
    [ ! -e "${checkpoints[-1]}" ] || newest=${checkpoints[-1]%/COMPLETE}
    read_fault
    what=${fault%% (rank *}             # of several ranks with the same mistake any may be the first
    if [ "$newest" != "$last_newest" ]; then
        tried=0
    elif [ "$what" = "$last_fault" ] && [[ $fault == *'"lost_peer": false'* && $fault != *'was ended by'* ]]; then
        return 1
    fi
    [ "$tried" -lt "$most" ] || return 1
    tried=$((tried + 1)) last_newest=$newest last_fault=$what
    restart="restart $tried of $most, from ${newest##*/}"
    [ -n "$newest" ] || restart="restart $tried of $most, from the start"
}

read_fault() {
    fault=
    [ ! -e "$RUN_DIR/FAILED" ] || read -r -d '' fault < "$RUN_DIR/FAILED" || true
}
