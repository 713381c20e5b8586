//! Measures whether reads are slower through an id that a thread in a Landlock domain has registered.

use std::fs::File;
use std::sync::{Arc, OnceLock};

use fuse_backing::rights::RegistrarThread;
use fuse_backing::{Access, BackingFile, FopenFlags, OpenReply};
use libtest_mimic::Failed;

use crate::domain::restrict;
use crate::fuse::{Connection, Init, Node};
use crate::reader::{Kind, Reader};
use crate::sandbox::Sandbox;
use crate::support::{Contest, Report};
use crate::{PATIENCE, make_data};

const PLAIN: &str = "registered by this thread";
const ENFORCED: &str = "registered in a Landlock domain";

pub fn run(report: &mut Report) -> Result<(), Failed> {
    let sandbox = Sandbox::patient("enforced", PATIENCE)?;
    let path = sandbox.folder("source")?.join("data");
    make_data(&path)?;
    // One file under two names, because one of two files might lie better in memory.
    let file = File::open(path)?;
    let node = |name: &str| -> std::io::Result<Node> {
        let (name, backing) = (name.to_owned(), file.try_clone()?);
        Ok(Node { name, backing })
    };
    let nodes = vec![node("plain")?, node("enforced")?];

    let ids: Arc<OnceLock<[i32; 2]>> = Arc::default();
    let known = Arc::clone(&ids);
    let on_open = move |nodeid, _| {
        let reply = OpenReply::server(FopenFlags::empty())?;
        let mut out = reply.to_fuse_open_out(nodeid);
        out.open_flags = fuse_backing::uapi::FOPEN_PASSTHROUGH;
        out.backing_id = known.get().expect("registered")[(nodeid - Connection::NODE) as usize];
        Ok(out)
    };
    let connection = Connection::serve(&sandbox, Init::passthrough(1), nodes, Arc::new(on_open))?;
    let device = connection.device();
    let thread = Arc::new(connection.device());
    let thread = RegistrarThread::spawn(thread, || restrict(Access::ReadOnly))?;
    let plain = BackingFile::open(&device, &file, Access::ReadOnly)?;
    let enforced = BackingFile::open(&thread, &file, Access::ReadOnly)?;
    let registered = ids.set([plain.id().as_raw(), enforced.id().as_raw()]);
    registered.expect("set once");

    for kind in [Kind::SequentialRead, Kind::RandomRead] {
        let reader = |name: &str| Reader::start(&connection.path(name), kind, 1, false);
        let (mut plain, mut enforced) = (reader("plain")?, reader("enforced")?);
        let [wall, _cpu] = Contest::new(["call", "CPU"])
            .way(PLAIN, || plain.batch())
            .way(ENFORCED, || enforced.batch())
            .run(report.args().rounds(kind.rounds()));
        let title = format!("{}, registered in a Landlock domain", kind.title());
        report.comparison(&format!("enforced-{}", kind.id()), &title, &wall);
        report.at_most(&title, wall.ratio(ENFORCED, PLAIN), 1.02);
    }
    Ok(())
}
