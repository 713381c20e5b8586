//! The server's threads. As many as there are CPUs take turns: with sixteen, an open takes 1.3 times the CPU time. A
//! thread that watches them lets another one join when they all wait for something, and makes calls again that would
//! have blocked.

use std::cell::OnceCell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

/// How many clients can wait for a filesystem that hangs, and one more.
pub(crate) const MAX: usize = 32;

/// Between two looks at the threads, and two attempts at a call.
const PAUSE: Duration = Duration::from_millis(5);

/// Answers if it can. False: try again.
type Attempt = Box<dyn FnMut() -> bool + Send>;

pub(crate) struct Threads(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    turn: Condvar,
    watcher: Condvar,
}

#[derive(Default)]
struct State {
    /// How many threads take turns now.
    turns: usize,
    /// Threads that have served a request, and wait for their next one.
    ready: usize,
    /// Threads that serve one.
    busy: usize,
    /// Requests that were begun or ended so far.
    progress: u64,
    attempts: Vec<Attempt>,
    watched: bool,
    /// The filesystem is gone.
    over: bool,
}

/// A thread serves a request. When this is dropped, after the reply, it waits for one, or for its turn to do so.
pub(crate) struct Turn<'a>(&'a Shared);

thread_local! {
    /// In each thread that has served. It is dropped when the thread ends, since the filesystem is gone.
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

    /// The other threads are all at work: this one must not wait.
    pub(crate) fn is_last(&self) -> bool {
        self.0.lock().busy >= MAX
    }

    /// Makes the call, and sends what comes of it. If it `waits`, the call is made again until it is no longer EAGAIN.
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
        // Dropped unanswered, they give their clients EIO.
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

/// How many threads take turns if none of them has to wait.
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
