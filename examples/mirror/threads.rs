//! The server's threads. Normally as many threads as there are CPUs take turns reading requests: with sixteen, an open
//! costs 1.3 times the CPU time. A watcher thread adds another thread when all of them are blocked, and retries calls
//! that would have blocked.

use std::cell::OnceCell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

/// The number of threads. All but one may wait for filesystems that hang.
pub(crate) const MAX: usize = 32;

/// The interval at which the watcher checks the threads and retries calls.
const PAUSE: Duration = Duration::from_millis(5);

/// Makes a call and sends its reply. Returns false if the call has to be retried.
type Attempt = Box<dyn FnMut() -> bool + Send>;

pub(crate) struct Threads(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    turn: Condvar,
    watcher: Condvar,
}

#[derive(Default)]
struct State {
    /// How many threads may take turns now.
    turns: usize,
    /// Threads that wait for their next request. A thread counts after its first request.
    ready: usize,
    /// Threads that serve a request.
    busy: usize,
    /// Counts begins and ends of requests.
    progress: u64,
    /// Calls for the watcher to retry.
    attempts: Vec<Attempt>,
    /// The watcher is awake.
    watched: bool,
    /// The filesystem has ended.
    over: bool,
}

/// Exists while a thread serves a request. Dropped after the reply; the drop waits until it is the thread's turn again.
pub(crate) struct Turn<'a>(&'a Shared);

thread_local! {
    /// Set in each thread that has served a request. A thread ends when the filesystem has ended; the drop then wakes
    /// the other threads.
    static LEAVING: OnceCell<Threads> = const { OnceCell::new() };
}

impl Threads {
    pub(crate) fn new() -> std::io::Result<Self> {
        let state = State {
            turns: few(),
            ..State::default()
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            turn: Condvar::new(),
            watcher: Condvar::new(),
        });
        let watched = Arc::clone(&shared);
        thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || watched.watch())?;
        Ok(Self(shared))
    }

    pub(crate) fn begin(&self) -> Turn<'_> {
        let leaving = || Self(Arc::clone(&self.0));
        let is_first = LEAVING.with(|cell| cell.get().is_none() && cell.set(leaving()).is_ok());
        let mut state = self.0.lock();
        state.ready -= usize::from(!is_first && state.ready > 0);
        state.busy += 1;
        state.progress += 1;
        self.0.see_watched(&mut state);
        Turn(&self.0)
    }

    /// Whether all other threads serve requests, so that this one must not block.
    pub(crate) fn is_last(&self) -> bool {
        self.0.lock().busy >= MAX
    }

    /// Makes the call and sends its result. If `waits`, EAGAIN is not sent: the watcher retries the call.
    pub(crate) fn answer<T: 'static>(
        &self,
        waits: bool,
        mut call: impl FnMut() -> Result<T, Errno> + Send + 'static,
        send: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) {
        let result = call();
        if !waits || !matches!(result, Err(Errno::AGAIN)) {
            return send(result);
        }
        let mut send = Some(send);
        let attempt = Box::new(move || {
            let result = call();
            let is_answer = !matches!(result, Err(Errno::AGAIN));
            if let Some(send) = send.take_if(|_| is_answer) {
                send(result);
            }
            is_answer
        });
        let mut state = self.0.lock();
        state.attempts.push(attempt);
        self.0.see_watched(&mut state);
    }
}

impl Shared {
    fn watch(&self) {
        let mut seen = 0;
        let mut state = self.lock();
        while !state.over {
            let is_still = state.progress == seen;
            seen = state.progress;
            if is_still && state.busy == 0 && state.attempts.is_empty() {
                state.turns = few();
                state.watched = false;
                let woken = self.watcher.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if is_still && state.ready == 0 && state.busy > 0 && state.turns < MAX {
                state.turns += 1;
                self.turn.notify_one();
            }
            let mut attempts = std::mem::take(&mut state.attempts);
            drop(state);
            attempts.retain_mut(|attempt| !attempt());
            state = self.lock();
            state.attempts.append(&mut attempts);
            let woken = self.watcher.wait_timeout(state, PAUSE);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        // A reply that is dropped unsent gives its client EIO.
        let attempts = std::mem::take(&mut state.attempts);
        drop(state);
        drop(attempts);
    }

    fn see_watched(&self, state: &mut State) {
        if !state.watched {
            state.watched = true;
            self.watcher.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many threads take turns while none of them is blocked.
fn few() -> usize {
    thread::available_parallelism().map_or(2, |cpus| cpus.get().max(2))
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.busy -= 1;
        state.progress += 1;
        while state.ready >= state.turns && !state.over {
            let woken = self.0.turn.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        state.ready += 1;
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.turn.notify_all();
        self.0.watcher.notify_one();
    }
}
