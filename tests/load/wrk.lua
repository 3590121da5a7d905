-- What wrk sends: one of the targets in the file LOAD_TARGETS, at random, again and again. The environment says the
-- rest, so that the token is on no command line: LOAD_HOST, LOAD_TOKEN, LOAD_SEED, LOAD_CLOSE (a new connection a request).
-- At the end it prints one line of JSON.

local requests = {}
local count = 0
local random = math.random

-- Requests are put together once, as wrk should cost as little as it can.
function init()
  math.randomseed(tonumber(os.getenv("LOAD_SEED")))
  local fields = "Host: " .. os.getenv("LOAD_HOST") .. "\r\nAuthorization: Bearer " .. os.getenv("LOAD_TOKEN") .. "\r\n"
  if os.getenv("LOAD_CLOSE") == "true" then
    fields = fields .. "Connection: close\r\n"
  end
  for target in io.lines(os.getenv("LOAD_TARGETS")) do
    count = count + 1
    requests[count] = "GET " .. target .. " HTTP/1.1\r\n" .. fields .. "\r\n"
  end
end

function request()
  return requests[random(count)]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "duration_us": %d, "bytes": %d, "p50_us": %d, "p99_us": %d, "p999_us": %d, '
      .. '"error_statuses": %d, "connect_errors": %d, "read_errors": %d, "write_errors": %d, "timeouts": %d}\n',
    summary.requests, summary.duration, summary.bytes,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
    errors.status, errors.connect, errors.read, errors.write, errors.timeout
  ))
end
