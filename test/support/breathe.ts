/**
 * Between two tests the event loop gets its turn. Tests on a clock of their own never give way to it, and the runner takes a
 * worker for dead that has not heard it for a minute: on a slow machine that is one file.
 */
import { afterEach } from "vitest"

afterEach(() => new Promise<void>((resolve) => setImmediate(resolve)))
