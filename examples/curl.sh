#!/bin/sh
# Plain HTTP. Needs OPENAI_BASE_URL and OPENAI_API_KEY (see README.md here).
set -eu
call() { curl --silent --show-error --fail-with-body -H "Authorization: Bearer $OPENAI_API_KEY" "$@"; }
json='Content-Type: application/json'

call "$OPENAI_BASE_URL/models"
echo
model=${MODEL:-$(call "$OPENAI_BASE_URL/models" | sed 's/.*"data":\[{"id":"\([^"]*\)".*/\1/')}

call "$OPENAI_BASE_URL/chat/completions" -H "$json" \
    -d "{\"model\": \"$model\", \"max_tokens\": 32, \"messages\": [{\"role\": \"user\", \"content\": \"hello\"}]}"
echo

# -N: show each chunk as it comes; the last lines are the usage and [DONE].
call -N "$OPENAI_BASE_URL/chat/completions" -H "$json" \
    -d "{\"model\": \"$model\", \"max_tokens\": 32, \"stream\": true, \"stream_options\": {\"include_usage\": true},
         \"messages\": [{\"role\": \"user\", \"content\": \"你好\"}]}"

# No key needed: is it ready, and what is it doing?
root=${OPENAI_BASE_URL%/v1}
curl --silent --fail "$root/health/ready"
echo
curl --silent --fail "$root/metrics" | head -n 5
