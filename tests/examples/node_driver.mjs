// Makes the calls that a test writes to stdin, a line of JSON each, with the client of examples/node, and prints what
// comes of each: lines of {"line": its number, "result" | "error" | "part" | "left": ...}.
import { createInterface } from "node:readline"
import { Client, readProfile } from "../../examples/node/client.mjs"

const client = new Client(readProfile(process.argv[2])), answers = []

async function answer({ tool, args, seconds, streams, leave_at: leaveAt }, line) {
  const print = (fields) => console.log(JSON.stringify({ line, ...fields }))
  try {
    if (!streams) return print({ result: await client.call(tool, args, seconds) })
    for await (const part of client.stream(tool, args, seconds)) {
      print({ part })
      if (part === leaveAt) return print({ left: part })
    }
    print({ result: null })
  } catch ({ code, message, retryable, details }) {
    print({ error: { code, message, retryable, details } })
  }
}

for await (const line of createInterface(process.stdin)) answers.push(answer(JSON.parse(line), answers.length + 1))
await Promise.all(answers)
await client.close()
