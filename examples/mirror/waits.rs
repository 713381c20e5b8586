//! Calls that would block are made again until they do not, all by one thread: so a client that waits for a lease to be
//! broken takes no thread of the server from the others.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

/// Between two attempts. A lease is broken within seconds.
const PAUSE: Duration = Duration::from_millis(5);

/// Answers if it can. False: try again.
type Attempt = Box<dyn FnMut() -> bool + Send>;

pub(crate) struct Waits {
    queue: Sender<Attempt>,
}

impl Waits {
    pub(crate) fn new() -> std::io::Result<Self> {
        let (queue, inbox) = channel();
        thread::Builder::new()
            .name("waits".to_owned())
            .spawn(move || serve(&inbox))?;
        Ok(Self { queue })
    }

    /// Makes the call, and sends what comes of it: at once, but for EAGAIN that is to be waited out.
    pub(crate) fn answer<T: 'static>(
        &self,
        waits: bool,
        mut call: impl FnMut() -> Result<T, Errno> + Send + 'static,
        send: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) {
        let mut send = Some(send);
        let mut attempt = move || {
            let result = call();
            if waits && matches!(result, Err(Errno::AGAIN)) {
                return false;
            }
            if let Some(send) = send.take() {
                send(result);
            }
            true
        };
        if !attempt() {
            // Refused if the thread is gone: dropped unanswered, it gives the client EIO.
            let _ = self.queue.send(Box::new(attempt));
        }
    }
}

/// Until the filesystem is gone; who waits then is not waited for.
fn serve(inbox: &Receiver<Attempt>) {
    let mut waiting = Vec::new();
    while let Ok(first) = inbox.recv() {
        waiting.push(first);
        while !waiting.is_empty() {
            thread::sleep(PAUSE);
            loop {
                match inbox.try_recv() {
                    Ok(attempt) => waiting.push(attempt),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            waiting.retain_mut(|attempt| !attempt());
        }
    }
}
