# The SDK for Ruby.
# Newer SDKs ask it what system this is.
require "rubygems"
require "json"
require "aws-sdk-core"

def tell
  start = Process.clock_gettime(Process::CLOCK_MONOTONIC)
  error = nil
  begin
    yield
  rescue StandardError => e
    error = "#{e.class}: #{e.message}"
  end
  puts JSON.generate(seconds: Process.clock_gettime(Process::CLOCK_MONOTONIC) - start, error: error)
  $stdout.flush
end

client = nil
tell do
  client = Aws::STS::Client.new(endpoint: ENV["STS_URL"], region: ENV["AWS_REGION"], retry_limit: 0)
  client.get_caller_identity
end
while (line = $stdin.gets)
  tell do
    # As if they had come to their end.
    client.config.credentials.refresh! unless line.chomp == "go on"
    client.get_caller_identity
  end
end
